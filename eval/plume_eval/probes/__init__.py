"""Whether the latent states of a model are used, and what they hold: causal probes on a hops data set."""
