// What tests need of a connection and a program does not: peers that do not keep to the rules.

@testable import DIMWire

extension WorkerConnection {
    /// Answers a HELLO with an ACCEPT of any terms.
    mutating func answerHello(with terms: Terms, now: Milliseconds) {
        self.terms = terms
        self.terms.version = chosen
        accept(now: now)
    }

    /// A message as given, whatever the state says.
    mutating func send(unchecked message: [UInt8], now: Milliseconds) { link.send(encoded: message, now: now) }
}

extension HostConnection {
    /// A message as given, whatever the state says.
    mutating func send(unchecked message: [UInt8], now: Milliseconds) { link.send(encoded: message, now: now) }

    /// Forgets what was sealed since the handshake: the next frame is number 0 again.
    mutating func restartSending() { link.restartSending() }
}

extension Link {
    fileprivate mutating func restartSending() {
        output.removeAll()
        sealer?.restart()
    }
}

extension FrameSealer {
    fileprivate mutating func restart() { number = 0 }
}
