"""Peers: other people's models, fitted by replay on events before the cut and asked through the same pipeline.

They are what a run has to beat; they are never trained into a run and never serve.

base         what every peer shares: the interactions it is fitted on, and the source that answers with its scores
factors      als, bpr: matrix factorisation by `implicit`
ease         ease: the closed-form item-item autoencoder
tifu_knn     tifu_knn: next-basket nearest neighbours
lambdamart   lambdamart: LightGBM on the very lists and features that `rank` was trained on
"""

from recsys.replay.peers.fit import NO_PEERS, PEER_ARMS, Peers, fit_peers

__all__ = ["NO_PEERS", "PEER_ARMS", "Peers", "fit_peers"]
