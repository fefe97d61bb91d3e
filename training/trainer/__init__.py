"""The parts of the PPO trainer; training/ppo.py puts them together."""
