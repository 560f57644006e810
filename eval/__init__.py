"""``python -m eval``: is the concept gone, and is everything else still there?"""
