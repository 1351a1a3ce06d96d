"""What a response is worth: one file a reward, and a pool of workers that run them."""
