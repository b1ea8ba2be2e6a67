"""KV memory in slots of equal length, with PyTorch's SDPA: any device, dtype and model.

slot_manager.py  number and length of slots (plain Python)
slot_cache.py    keys and values in slots
sdpa.py          attention over slots
slot_runner.py   `SlotRunner`: one ragged forward pass of one model over slots
"""
