"""A whole FlexLB cluster in virtual time: event loop, processes, network, Redis and Kafka, from one seed.

`loop.run` owns time, `network.Network` owns chance, `redis.SimRedis` and `kafka.SimKafka` are the
servers; each gives a `network.Process` clients of the same shape as the real libraries'. Nothing here
knows FlexLB's own classes, so that production code runs on top of it unchanged.
"""
