// Keys of paired hosts in the keychain: on this device only, readable after the first unlock.
import DIMCrypto
import DIMServer
import DIMWire
import Foundation
import Security

struct KeychainKeys: KeyStore {
    private static let service = "dim.pair-keys"

    func keys() -> [PairKey] {
        let query: [CFString: Any] = [
            kSecClass: kSecClassGenericPassword, kSecAttrService: KeychainKeys.service, kSecReturnData: true,
            kSecReturnAttributes: true, kSecMatchLimit: kSecMatchLimitAll,
        ]
        var result: CFTypeRef?
        guard SecItemCopyMatching(query as CFDictionary, &result) == errSecSuccess,
            let items = result as? [[CFString: Any]]
        else { return [] }
        return items.compactMap { ($0[kSecValueData] as? Data).flatMap { PairKey([UInt8]($0)) } }
    }

    func add(_ key: PairKey, name: String) throws {
        let item: [CFString: Any] = [
            kSecClass: kSecClassGenericPassword, kSecAttrService: KeychainKeys.service,
            kSecAttrAccount: hex(key.id.bytes), kSecAttrLabel: shown(name), kSecValueData: Data(key.bytes),
            kSecAttrAccessible: kSecAttrAccessibleAfterFirstUnlockThisDeviceOnly,
        ]
        let status = SecItemAdd(item as CFDictionary, nil)
        guard status == errSecSuccess else { throw KeyStoreError("the keychain refused the key (\(status))") }
    }
}
