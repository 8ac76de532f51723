"""Files: peft's formats, read and written with checks, and atomic writes. Nothing here knows fastlora's models."""
