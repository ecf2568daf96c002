"""The processes that train together.

Who is here: `launchers` reads what a launcher told; `rendezvous` opens the store that all share and finds the others over the
`network`, as `peers`; `group` makes the process group, with `switches` for what it sets in the process. `mpirun` starts ranks on
this host; `cores` are those of the job.

Agreeing: `agree` through the store, where ranks may take hours; `gather` in a collective at each step.

Not waiting in vain, from the inside to the outside:

- `wait`: every wait on the store. It has a bound, and ends at once where another rank has failed or ended.
- `watch`: every wait in a collective for gradients. It has a bound, and the rank that is missing is named.
- `lifeline`: around what ranks do together in a command. A rank that fails, dies or hangs ends the others, wherever they wait.
- `watchdog`: a process beside each rank of a command, from the first import to the last. It ends a rank that stands still.

`phase` tells all four where a process stands and what it waits for; `processes` is what the system tells of it.
"""
