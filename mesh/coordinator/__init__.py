"""The coordinator: it takes requests, and decides which shards compute what next.

From a request to its first frame:

    1. intake.py     parses the request; requests.py makes tokens of its prompt. A session that is known already is answered from
                     here, or passed on (continuity.py).
    2. jobs.py       holds the request until its last document has been sent.
    3. driver.py     gives the core a Submit.
    4. core/         machine.py queues the session, routing.py chooses its shards, rows.py asks for a row at each.
    5. effects.py    has the session written down (records.py), tells the client of a stream that it is accepted, and lets shards.py
                     ask for the rows. Each answer is an event for the driver.
    6. core/         when every row is open, scheduler.py cuts the history in chunks.
    7. outbox.py     writes the first frame to the first stage (translate.py makes it).

From an answer of the last stage to the client:

    1. intake.py     decodes the frame; translate.py makes a Result of it.
    2. driver.py     gives it to the core.
    3. core/         machine.py appends the token to the session's history; scheduler.py puts the session in the next decode step.
    4. outbox.py     writes the next frame; measure.py and trace.py note how long the last one took.
    5. effects.py    lets replies.py make the token's document, and has the record written again.
    6. outbox.py     writes the document to the client. From then on the token counts as delivered.

The files:

    service.py       the life of a coordinator: start, heartbeats, stop
    intake.py        what arrives becomes an event
    jobs.py          the requests that are held
    driver.py        one turn of the core: an event in, its effects out in the right order
    effects.py       what the core wants done is passed to the part that does it
    shards.py        leases, rows and probes of shards; openings.py asks for several rows at once
    listeners.py     whether the senders of requests without a stream still listen
    outbox.py        what goes out, in order
    requests.py      a request is checked, and its prompt made tokens
    tokenizing.py    what the tokens of a text are, and the text of tokens
    prompt_pool.py   the processes that make tokens of prompts; prompt_process.py is what one of them runs
    replies.py       the documents that a client gets
    stops.py         stop texts, found as the text comes
    translate.py     frames and leases to the core's values, and back
    records.py       sessions are written down, so that another coordinator can go on with them
    continuity.py    other coordinators are watched, and what they leave is taken over
    kept.py          coordinators tell each other what rows hold that a session may begin with
    crashes.py       coordinators that crashed while no other one ran are announced
    batch.py         durable batches, while no client waits
    measure.py       how long steps take
    generations.py   how long generations took
    metrics.py       what the metrics say of a coordinator
    tracing.py       requests are recorded, questions about them answered, spans sent on
    trace.py         the record of each request; trace_steps.py has its steps, trace_spans.py makes spans of it
    clocks.py        how far the shards' clocks are ahead
    span_store.py    spans that other processes have sent
    server_traces.py what nats-server reports of a frame
    access.py        the line in the log of each request that has ended
    description.py   the manifest and the tokenizer of the model

    core/            the decisions: pure, no await, no clock
"""
