"""peft's files: what an adapter's config says, read and written with checks; no model is known here."""
