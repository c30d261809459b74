"""The demo's trained checkpoint, its n-gram baseline and the evaluation that compares them."""
