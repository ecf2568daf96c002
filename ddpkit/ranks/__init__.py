"""The processes that train together.

Who is here: `launchers` reads what a launcher told, `rendezvous` opens the store that all share and finds the others over the
`network`, `group` makes the process group of them. `mpirun` starts ranks on this host, `cores` are those of the job.

Agreeing: `agree` waits through the store, for hours where need be; `gather` communicates at each step.

Ending together: `phase` tells where a process stands, `watch` who is missing in a collective, `lifeline` has all ranks end soon
where one has failed, `watchdog` bounds the life of each from outside.
"""
