"""The event-driven linear layer: rows of integer weights, fetched for the inputs that fire."""
