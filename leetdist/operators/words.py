"""What `explain` and `doctor` say of who computes."""

from __future__ import annotations

from collections.abc import Iterable

from leetdist.operators.choice import Choice, Refusals

WORDS = {
    "tile_states": "states",
    "transitions": "decays of tiles",
    "row_outputs": "outputs of whole sequences",
    "weighted_values": "v times its weights",
    "skipped_outputs": "D x without z",
    "decay_gradient": "gradient of log_decay",
    "early_gradients": "gradient of q",
    "late_gradients": "gradients of k, v and log_decay",
    "scan_steps": "dt",
    "scan_outputs": "D x and z",
    "scan_inputs_gradient": "gradients of x, dt, A and D",
    "scan_outputs_gradient": "gradient of z",
    "convolution": "convolution",
    "convolution_gradient": "its gradient",
} | {x: x for x in ("fold", "step", "steps")}


def in_words(choices: Iterable[Choice]) -> list[dict[str, str]]:
    """Who computes which steps, in what configuration; of who computes the same in both passes, once."""
    steps: dict[tuple[str, str, str], dict[str, bool]] = {}
    for choice in choices:
        who = choice.name, choice.implementation.module, choice.implementation.configuration(choice.facts)
        word = WORDS.get(choice.use.step, "outputs")
        known = steps.setdefault(who, {})
        known[word] = known.get(word, False) or choice.use.forward
    return [
        {
            "steps": ", ".join(word if forward else f"{word} of the backward pass" for word, forward in known.items()),
            "name": name,
            "module": module,
            "configuration": configuration,
        }
        for (name, module, configuration), known in steps.items()
    ]


def refusals(choices: Iterable[Choice], unserved: Refusals = ()) -> list[dict[str, str]]:
    """Who was asked before them, and for what nobody need do, and why not."""
    every = (*(one for choice in choices for one in choice.refused), *unserved)
    rows = ((who.name, who.module, reason) for who, reason in every)
    return [{"name": name, "module": module, "reason": reason} for name, module, reason in dict.fromkeys(rows)]
