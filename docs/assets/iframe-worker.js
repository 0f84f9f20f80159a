// A page from a folder may start no Worker, and the search wants one: there, its script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      const script = new URL(url, document.baseURI).href;
      addEventListener("message", (event) => {
        if (event.source === frame.contentWindow) this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      frame.addEventListener("load", () => {
        this.frame = frame.contentWindow;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      });
      // The script's own postMessage(data) is a worker's: to whoever started it.
      frame.srcdoc =
        `<script>window.postMessage = (data) => parent.postMessage(data, "*")</scr` + `ipt>` +
        `<script src="${script}"></scr` + `ipt>`;
    }
    postMessage(data) {
      if (this.frame === undefined) this.waiting.push(data);
      else this.frame.dispatchEvent(new MessageEvent("message", { data }));
    }
    terminate() {}
  };
}
