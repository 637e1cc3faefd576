"""Place the processes of a run on a Ray cluster, and talk to the reward actor.

ray_cluster.py    starts or joins Ray; placement groups; the actors: learners, engines, reward
reward_actor.py   the actor that scores a whole global batch
reward_client.py  the controller's side of it; restarts it when it dies
selfcheck.py      compares log-probabilities of engines and learners before training
prometheus.py     exports a run's metrics through Ray
"""
