"""GPT-Omega for Transformers. These files travel with every export, so they import each other and nothing of ours."""
