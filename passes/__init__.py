"""fxquant."""
