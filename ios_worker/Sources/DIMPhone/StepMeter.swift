// Rows and times of steps, counted on the server's threads and shown now and then.
import DIMServer
import DIMWire
import Foundation

public final class StepMeter: @unchecked Sendable {
    public struct Reading: Equatable, Sendable {
        public var rows = 0
        public var rowsPerSecond = 0.0
        public var millisecondsPerStep = 0.0

        public init() {}
    }

    private let lock = NSLock()
    private var rows = 0
    /// of the last steps: when they ended, rows, how long they took
    private var recent: [(time: Milliseconds, rows: Int, microseconds: UInt64)] = []

    public init() {}

    /// Counts a step that has just ended.
    public func add(rows: Int, microseconds: UInt64, now: Milliseconds = monotonicMilliseconds()) {
        lock.withLock {
            self.rows += rows
            recent.append((now, rows, microseconds))
            if recent.count > 64 { recent.removeFirst() }
        }
    }

    public func reset() {
        lock.withLock {
            rows = 0
            recent = []
        }
    }

    /// As of the last five seconds.
    public func reading(now: Milliseconds = monotonicMilliseconds()) -> Reading {
        lock.withLock {
            recent.removeAll { now - $0.time > 5000 }
            var reading = Reading()
            reading.rows = rows
            guard let first = recent.first, let last = recent.last else { return reading }
            let span = Double(max(last.time - first.time, 1)) / 1000
            let counted = recent.dropFirst().reduce(0) { $0 + $1.rows }
            reading.rowsPerSecond = counted > 0 ? Double(counted) / span : 0
            let total = recent.reduce(UInt64(0)) { $0 + $1.microseconds }
            reading.millisecondsPerStep = Double(total) / Double(recent.count) / 1000
            return reading
        }
    }
}
