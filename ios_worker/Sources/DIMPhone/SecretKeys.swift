// Keys of paired hosts in a keychain. What a keychain is asked is kept to what every system answers: which items there
// are, and the secret of one of them. The secrets of all at once is a question that macOS refuses.
import DIMCrypto
import DIMServer
import DIMWire
import Foundation

/// A keychain, as far as it is needed.
public protocol SecretStore: Sendable {
    /// The accounts of all items of this app's service: no secrets. Throws where the keychain does not say.
    func accounts() throws -> [String]
    /// The secret of one account; nil if there is none, or the device has not been unlocked yet.
    func secret(_ account: String) -> [UInt8]?
    /// Keeps a secret, under a name for people.
    func add(_ secret: [UInt8], account: String, label: String) throws
}

public struct SecretKeys: KeyStore {
    private let store: any SecretStore

    public init(_ store: any SecretStore) { self.store = store }

    public func list() throws -> KeyList {
        var list = KeyList([])
        for account in try store.accounts() {
            if let secret = store.secret(account) {
                if let key = PairKey(secret) { list.keys.append(key) }
            } else if let id = unhex(account).flatMap({ KeyID($0) }) {
                list.unread.insert(id)
            }
        }
        return list
    }

    public func add(_ key: PairKey, name: String) throws {
        try store.add(key.bytes, account: hex(key.id.bytes), label: shown(name))
    }
}
