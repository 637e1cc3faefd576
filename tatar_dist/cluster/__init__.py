"""Place the processes of a run on a Ray cluster, and talk to the reward actor.

ray_start.py      starts Ray on this machine or joins a cluster
ray_cluster.py    placement groups and the actors: learners, engines, reward
nodes.py          asks every node, for example about its GPUs
reward.py         the actor that scores a whole global batch, and the controller's client, which restarts it
selfcheck.py      compares log-probabilities of engines and learners before training
prometheus.py     exports a run's metrics through Ray
"""
