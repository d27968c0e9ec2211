"""Where do keys and values live? Device window, pinned host pages, and the copies between them.

- `pages`: which host page holds which block of which sequence (plain numbers).
- `pinned`: host memory at a fixed address, pinned exactly, growing in place.
- `transfer`: the copies between the tiers, their streams, buffers and events.
- `store`: one layer's keys and values over both tiers: append, attend, evict, crop.
"""
