"""Text out of a trained model: loading it from any checkpoint, cached decoding, sampling, filling masks."""
