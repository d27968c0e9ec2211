"""Where does each token live, and what does it cost to use it from there?

| file | what |
|---|---|
| `layout` | where every byte of a run goes, and how many tokens stay on the device |
| `rungs` | which low-bit replicas there are, and what a token takes in each |

Plain numbers, standard library only, so that a plan can be made on any machine. Exact mode has one
placement; a cost model that chooses between several comes with the first mode that has a choice.
"""
