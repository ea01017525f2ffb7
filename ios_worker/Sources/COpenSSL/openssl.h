// The part of OpenSSL's libcrypto that DIMCrypto uses on Linux.
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/sha.h>
