"""Plain Hugging Face model files: written as a stream and put in place atomically, read by shares."""
