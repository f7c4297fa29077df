"""Where a job's model comes from: Hugging Face, a Megatron checkpoint, a function, Megatron-Bridge."""
