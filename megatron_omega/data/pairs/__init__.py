"""Supervised pairs as a source of samples: records to pairs, pairs to packed rows."""
