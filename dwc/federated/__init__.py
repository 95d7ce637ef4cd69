"""The consolidation cycle over many sites, on NVIDIA FLARE.

The server sends out a prior, sites return posteriors, and the consolidated posterior is the prior of the next round.
Messages are answered in seconds; training runs as a detached process at the site. `project` is the consortium's
agreement, `cycle` the server's state, `spool` a site's, `exchange` the two classes that FLARE runs, `provisioning` its
start-up kits, `service` the long-running processes and `local` a simulation on one machine.
"""
