"""Rewards that another program computes: a vision-language judge, or a JSON reward server."""
