from leetdist.sequence.p2p import PointToPoint


def make_transport(group, transport=None):
    return PointToPoint(group)
