"""From records to rows of tokens: formats, item processing, planning and loading. Never imports `model`."""
