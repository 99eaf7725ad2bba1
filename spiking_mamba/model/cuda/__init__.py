"""A token of an event-driven model on CUDA in few launches: three a mixer, two an MLP."""
