// When packages are loaded: one load at a time, none forgotten. A push that ends while another slice is being loaded (which
// takes minutes the first time) is loaded after it; what failed is tried again when a person says so.
import Foundation

@MainActor
public final class SliceLoading<Wish: Sendable> {
    private let newest: () -> URL?
    private let load: (URL?, Wish) async -> Bool
    /// of the next load, if one is wanted
    private var wanted: Wish?
    /// what the last load was of, and whether it is served
    private var last: (place: URL?, isServed: Bool)?
    public private(set) var isRunning = false

    /// - Parameters:
    ///   - newest: where the packages lie that should be served; nil if there are none
    ///   - load: loads and serves them, or says what is wrong; true if they are served
    public init(newest: @escaping () -> URL?, load: @escaping (URL?, Wish) async -> Bool) {
        self.newest = newest
        self.load = load
    }

    /// The newest packages are to be loaded, at once or after the load that is running.
    public func want(_ wish: Wish) {
        wanted = wish
        guard !isRunning else { return }
        isRunning = true
        Task { await run() }
    }

    /// The app came to the front: packages may have been copied here meanwhile. What is being loaded, is served or has
    /// failed is not loaded again.
    public func look(_ wish: Wish) {
        guard !isRunning else { return }
        if let last, last.place?.path == newest()?.path { return }
        want(wish)
    }

    private func run() async {
        while let wish = wanted {
            wanted = nil
            let place = newest()
            last = (place, await load(place, wish))
        }
        isRunning = false
    }

    /// Whether the last load failed: trying again may help.
    public var hasFailed: Bool { !isRunning && last.map { $0.place != nil && !$0.isServed } ?? false }
}
