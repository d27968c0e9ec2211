"""Where does each token live, and what does it cost to use it from there?

| file | what |
|---|---|
| `layout` | where every byte of a run goes, and how many tokens stay on the device |
| `rungs` | which low-bit replicas there are, and what a token takes in each |
| `ladder` | which layer takes which rung |
| `pace` | how many tokens are drafted at once |
| `profiles` | what cards can do |
| `cost` | how long a prefill, a step and a pass take |
| `phases` | which tokens stay on the device, which on the host, and which are computed again |
| `simulate` | a workload replayed under a policy |

Plain numbers, standard library only, so that a plan can be made on any machine.
"""
