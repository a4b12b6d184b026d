"""The laptop default: emoji scenes with exact ground truth, their tokenizers, and their scorer."""
