"""peft's own layers, sped up in place, and the conditions under which they step back."""
