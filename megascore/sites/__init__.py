"""Sites: what can be scored in a model and where. Targets, requests, places, and the view of plain PyTorch models."""
