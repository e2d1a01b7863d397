"""What every Membership does; groups need Apache Kafka, see conftest.py."""

import time

ARRIVAL_S = 120


def test_a_member_alone_has_everything_and_tells_how_far_it_is(log, topics):
    member = log.membership(f"double11-{topics.events}", topics.events)
    deadline_s, everything = time.monotonic() + ARRIVAL_S, frozenset(range(4))
    while member.poll() != everything:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    member.commit({topics.events: {0: 7}, topics.impressions: {0: 1}})
    member.commit({})
    assert member.poll() == everything
    member.close()


def test_members_share_what_there_is_and_the_last_one_gets_it_all(log, topics):
    members = [log.membership(f"double11-{topics.events}", topics.events)]
    if not members[0].is_group:
        return  # one process reads an embedded log
    members.append(log.membership(f"double11-{topics.events}", topics.events))
    everything = frozenset(range(4))

    def until(ready) -> None:
        deadline_s = time.monotonic() + 3 * ARRIVAL_S
        while True:
            assigned = [m.poll() for m in members]
            if ready(assigned):
                return
            assert time.monotonic() < deadline_s, assigned
            time.sleep(0.01)

    until(lambda a: [len(ps) for ps in a] == [2, 2] and frozenset().union(*a) == everything)
    members.pop(0).close()
    until(lambda a: a == [everything])
    members[0].close()
