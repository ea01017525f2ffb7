// Makes the worker known on the local network as _dim._tcp. Only this needs the user's permission: listening and accepting
// do not, so a refusal is said and nothing else stops.
import Dispatch
import dnssd

@MainActor
final class Bonjour {
    private var reference: DNSServiceRef?
    private var context: Unmanaged<Context>?

    private final class Context: Sendable {
        let denied: @Sendable () -> Void
        init(_ denied: @escaping @Sendable () -> Void) { self.denied = denied }
    }

    /// Registers `name` at `port`; `denied` is called if the user does not allow it.
    func start(name: String, port: UInt16, denied: @escaping @Sendable () -> Void) {
        stop()
        let context = Unmanaged.passRetained(Context(denied))
        var made: DNSServiceRef?
        let failure = DNSServiceRegister(
            &made, 0, 0, name, "_dim._tcp", nil, nil, port.bigEndian, 0, nil,
            { _, _, error, _, _, _, context in
                guard error != DNSServiceErrorType(kDNSServiceErr_NoError), let context else { return }
                Unmanaged<Context>.fromOpaque(context).takeUnretainedValue().denied()
            }, context.toOpaque())
        guard failure == DNSServiceErrorType(kDNSServiceErr_NoError), let made else {
            context.release()
            denied()
            return
        }
        reference = made
        self.context = context
        _ = DNSServiceSetDispatchQueue(made, .main)
    }

    func stop() {
        // no reply comes after the reference is gone
        if let reference { DNSServiceRefDeallocate(reference) }
        reference = nil
        context?.release()
        context = nil
    }
}
