// The books that both sides keep about the sessions of a connection (docs/PROTOCOL.md section 7). The worker refuses
// what breaks them, the host does not send it.

public struct SessionBooks: Sendable {
    private let agreed: Agreed
    private var lengths: [UInt32]
    private var lastID: UInt32 = 0
    private var unanswered: [(id: UInt32, rows: Int)] = []

    public init(_ agreed: Agreed) {
        self.agreed = agreed
        lengths = [UInt32](repeating: 0, count: Int(agreed.maxSessions))
    }

    /// Rows that `session` holds.
    public func length(of session: UInt32) -> UInt32 { lengths[Int(session)] }

    /// STEPs sent and not yet answered.
    public var inFlight: Int { unanswered.count }

    /// The id that the next STEP must have.
    public var nextID: UInt32 { lastID &+ 1 }

    /// A STEP: all its rules are checked before anything changes.
    public mutating func step(
        id: UInt32, rows: Int, format: RowFormat, exact: Bool = false, spans: [Span]
    ) throws(RuleBroken) {
        guard id == nextID, id != 0 else { throw RuleBroken(.stepID, "step \(id) after step \(lastID)") }
        guard unanswered.count < agreed.maxInFlight else {
            throw RuleBroken(.inFlight, "\(unanswered.count) steps are unanswered")
        }
        try check(format)
        guard !exact || agreed.features.contains(.exact) else { throw RuleBroken(.rowFormat, "each row by itself") }
        guard spans.count >= 1, spans.count <= agreed.maxSessions, spans.allSatisfy({ $0.count >= 1 }) else {
            throw RuleBroken(.spanCount, "\(spans.count) spans, or one of no rows")
        }
        var sum: UInt64 = 0
        for (index, span) in spans.enumerated() {
            try check(span.session)
            for earlier in spans[..<index] where earlier.session == span.session {
                throw RuleBroken(.sessionTwice, "session \(span.session)")
            }
            let length = lengths[Int(span.session)]
            guard span.position == length else {
                throw RuleBroken(
                    .position, "session \(span.session) holds \(length) rows, the step begins at \(span.position)")
            }
            let end = UInt64(span.position) + UInt64(span.count)
            guard end <= agreed.nCtx else {
                throw RuleBroken(.context, "session \(span.session) would hold \(end) rows of \(agreed.nCtx)")
            }
            sum += UInt64(span.count)
        }
        guard rows >= 1, rows <= agreed.maxRows, sum == rows else {
            throw RuleBroken(.rowCount, "\(rows) rows of at most \(agreed.maxRows), \(sum) in the spans")
        }

        for span in spans { lengths[Int(span.session)] = span.position + span.count }
        lastID = id
        unanswered.append((id, rows))
    }

    /// A STEP_DONE.
    public mutating func stepDone(id: UInt32, rows: Int, format: RowFormat) throws(RuleBroken) {
        guard let oldest = unanswered.first, oldest.id == id else {
            throw RuleBroken(.stepID, "STEP_DONE \(id), the oldest unanswered is \(unanswered.first?.id ?? 0)")
        }
        guard oldest.rows == rows else {
            throw RuleBroken(.rowCount, "\(rows) rows answer step \(id) of \(oldest.rows)")
        }
        try check(format)
        unanswered.removeFirst()
    }

    /// A STEP_FAILED. The lengths stay until they are taken back.
    public mutating func stepFailed(id: UInt32) throws(RuleBroken) {
        guard let oldest = unanswered.first, oldest.id == id else {
            throw RuleBroken(.stepID, "STEP_FAILED \(id), the oldest unanswered is \(unanswered.first?.id ?? 0)")
        }
        unanswered.removeFirst()
    }

    /// The oldest STEP without an answer.
    var oldest: UInt32? { unanswered.first?.id }

    public mutating func rewind(session: UInt32, position: UInt32) throws(RuleBroken) {
        try check(session)
        let length = lengths[Int(session)]
        guard position <= length else {
            throw RuleBroken(.position, "session \(session) holds \(length) rows, rewind to \(position)")
        }
        lengths[Int(session)] = position
    }

    public mutating func end(session: UInt32) throws(RuleBroken) {
        try check(session)
        lengths[Int(session)] = 0
    }

    private func check(_ format: RowFormat) throws(RuleBroken) {
        guard format.dtype == agreed.dtype else {
            throw RuleBroken(.rowFormat, "row format \(format.rawValue)")
        }
    }

    private func check(_ session: UInt32) throws(RuleBroken) {
        guard session < agreed.maxSessions else {
            throw RuleBroken(.session, "session \(session) of \(agreed.maxSessions)")
        }
    }
}

/// The books about a push: what of which file comes next (section 9).
struct PushBooks: Sendable {
    private let sizes: [UInt64]
    private var item: Int
    private var offset: UInt64
    private let have: [UInt64]

    init(_ items: [PushItem], have: [UInt64]) {
        sizes = items.map(\.size)
        self.have = have
        item = 0
        offset = have[0]
        skipComplete()
    }

    /// The item that comes next and from where; nil when all bytes are there.
    var next: (item: Int, offset: UInt64)? { item < sizes.count ? (item, offset) : nil }

    mutating func data(_ data: PushData) throws(RuleBroken) {
        guard let next else { throw RuleBroken(.pushOrder, "data after the last byte") }
        guard Int(data.item) == next.item, data.offset == next.offset else {
            throw RuleBroken(
                .pushOrder, "item \(data.item) at \(data.offset), expected item \(next.item) at \(next.offset)")
        }
        guard UInt64(data.bytes.count) <= sizes[item] - offset else {
            throw RuleBroken(.pushOrder, "item \(item) would be longer than announced")
        }
        offset += UInt64(data.bytes.count)
        skipComplete()
    }

    private mutating func skipComplete() {
        while item < sizes.count, offset == sizes[item] {
            item += 1
            offset = item < sizes.count ? have[item] : 0
        }
    }
}
