"""A `torch.compile` backend that quantizes the model it compiles."""
