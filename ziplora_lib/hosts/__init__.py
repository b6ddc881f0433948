"""Hosts: whoever has the model (the WebUI, or diffusers without one)."""
