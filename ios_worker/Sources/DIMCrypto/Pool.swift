// Objective-C's temporary objects on threads that never return to a run loop.
//
// On Apple systems Foundation and Core ML hand out autoreleased objects. A thread of our own has no pool but the one that
// ends with it: whatever a loop asks for in its turns is kept until the loop is over. So each turn of a loop has a pool.
import Foundation

/// Runs `body`; what it made temporarily is gone when it returns.
public func pooled<R>(_ body: () throws -> R) rethrows -> R {
    #if canImport(ObjectiveC)
        return try autoreleasepool(invoking: body)
    #else
        return try AutoreleaseStandIn.pool(body)
    #endif
}

#if !canImport(ObjectiveC)
    /// Where there is no Objective-C, tests count with this what it would keep: the same pools, by thread, over bytes.
    public enum AutoreleaseStandIn {
        /// Off, it costs nothing: tests switch it on.
        public nonisolated(unsafe) static var isOn = false

        /// Counts `bytes` as an object that the innermost pool of this thread lets go of; without a pool, nobody does.
        public static func add(bytes: Int) {
            guard let count = Thread.current.threadDictionary[key] as? Count else {
                let count = Count()
                count.add(bytes)
                Thread.current.threadDictionary[key] = count
                return
            }
            count.add(bytes)
        }

        /// The most bytes that were kept at once on any thread since `reset`.
        public static var most: Int { Count.most }

        public static func reset() { Count.most = 0 }

        static func pool<R>(_ body: () throws -> R) rethrows -> R {
            guard isOn else { return try body() }
            let before = (Thread.current.threadDictionary[key] as? Count)?.held ?? 0
            defer { (Thread.current.threadDictionary[key] as? Count)?.held = before }
            return try body()
        }

        private static let key = "dim.autoreleased"

        private final class Count: @unchecked Sendable {
            private static let lock = NSLock()
            nonisolated(unsafe) private static var highest = 0
            static var most: Int {
                get { lock.withLock { highest } }
                set { lock.withLock { highest = newValue } }
            }

            /// of one thread
            var held = 0

            func add(_ bytes: Int) {
                held += bytes
                if held > Count.most { Count.most = held }
            }
        }
    }
#endif
