"""Which of the offloaded tokens matter to this query?

Vector indexes over offloaded keys: NumPy, Numba and FAISS, no torch models. The folder is still
empty. Exact mode attends over every offloaded token, so it asks no index; the first one comes with
the first mode that reads fewer.
"""
