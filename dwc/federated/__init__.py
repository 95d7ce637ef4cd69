"""The cycle over many sites: a prior goes out, posteriors come back, the consolidated one is the next prior.

NVIDIA FLARE carries the messages; every exchange with a site is answered in seconds, whatever its training does.
`project` is what a consortium agrees on, `cycle` the server's books, `spool` a site's, `exchange` the two classes that
FLARE runs, `provisioning` its start-up kits, `service` the processes and `simulation` the planning on one machine.
Only the last four know of FLARE; the first three move files and can be followed by hand.
"""
