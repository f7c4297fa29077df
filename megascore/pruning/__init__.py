"""Smaller Hugging Face folders, made tensor by tensor from a larger one and a plan."""
