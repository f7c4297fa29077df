"""What can be scored in a model and where: targets, requests, places, sites, and the view of plain PyTorch models."""
