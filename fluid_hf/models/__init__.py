"""What is known about Hugging Face model families."""
