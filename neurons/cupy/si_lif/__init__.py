"""The signed-integer leaky integrate-and-fire neuron: multi-step, stateless, and with SGC's smooth path."""
