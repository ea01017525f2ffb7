// Which of too many handshakes is let go for a newer one.

/// Whose handshakes were let go lately. Of the accept thread.
struct Crowd {
    private var latest: [String] = []
    private var next = 0
    private var counts: [String: Int] = [:]

    /// How many of those that were let go are remembered.
    static let remembered = 256

    /// Which of `networks`, the oldest first, leaves: the oldest of the network that has the most, those counted that were
    /// let go lately. Who comes alone, or as two, is not driven out by a crowd, whether it comes from one network or from
    /// many.
    func leaves(_ networks: [String]) -> Int? {
        let here = Dictionary(grouping: networks) { $0 }.mapValues(\.count)
        let of = { (network: String) in (here[network] ?? 0) + (counts[network] ?? 0) }
        guard let most = networks.map(of).max() else { return nil }
        return networks.firstIndex { of($0) == most }
    }

    /// One of `network` was let go.
    mutating func add(_ network: String) {
        counts[network, default: 0] += 1
        if latest.count < Crowd.remembered {
            latest.append(network)
            return
        }
        let forgotten = latest[next]
        latest[next] = network
        next = (next + 1) % Crowd.remembered
        let left = (counts[forgotten] ?? 0) - 1
        counts[forgotten] = left > 0 ? left : nil
    }
}
