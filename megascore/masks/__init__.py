"""A smaller model inside of the larger one: what a plan drops takes no part in the forward pass, in any layout."""
